-- The source of the text that a score was measured on, where scores of one source make a mean of their own; NULL or '' elsewhere.

ALTER TABLE scores ADD COLUMN source VARCHAR;
