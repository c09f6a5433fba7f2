-- Concepts (from version 6 on): what the surface of the texts tells, and the best feature's top tokens in unrelated texts. ``source`` may
-- be 'surface' (a model of counts and words) and 'count' (one count alone); p of pairs is that of their signed ranks.

ALTER TABLE concept_features ADD COLUMN counted VARCHAR;            -- which count; of source 'count' alone
ALTER TABLE concept_features ADD COLUMN threshold DOUBLE;           -- of the largest code; divides the half that chose best
ALTER TABLE concept_features ADD COLUMN recall_threshold DOUBLE;    -- share of the texts showing the concept that reach it
ALTER TABLE concept_features ADD COLUMN top_tokens VARCHAR[];       -- tokens at the largest codes of the half that chose
ALTER TABLE concept_features ADD COLUMN injected_texts BIGINT;      -- texts about other things that got one of them
ALTER TABLE concept_features ADD COLUMN injected DOUBLE;            -- share of them that reach the threshold with it
