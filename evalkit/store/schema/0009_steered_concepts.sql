-- Steering: features clamped or added for a concept are told apart by it, not by their number, which two concepts may share.

ALTER TABLE steering_texts ADD COLUMN concept VARCHAR;    -- whose best feature it is; NULL where it was named or drawn
