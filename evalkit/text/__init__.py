"""Text: documents from any source (``corpora``), fit and scoring text kept apart (``split``), token windows (``windows``)."""
