-- Simulated tokens without a value (autointerp from version 2 on): predictions.predicted holds NULL for a token whose digits were not
-- seen well enough, and digit_mass is the probability of the digits that were seen.

ALTER TABLE predictions ADD COLUMN digit_unseen DOUBLE[]; -- bound: digits that were not listed have at most this probability; NULL where unknown
