"""What judges are asked, and how their answers are read: one module for each kind of question.

Raise ``VERSION`` with every change of wording of an explanation or a simulation; the rubric has a version of its own.
"""

VERSION = "2"
