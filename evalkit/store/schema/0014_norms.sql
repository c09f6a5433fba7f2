-- How the norms of a text lie on either side of the rule for massive activations; NULL in older files.

ALTER TABLE texts ADD COLUMN norm_limit DOUBLE;       -- largest norm kept, measured on the fitting text; NULL: none
ALTER TABLE texts ADD COLUMN norm_median DOUBLE;      -- median norm, first positions aside
ALTER TABLE texts ADD COLUMN massive_variance DOUBLE; -- share of the variance, about the mean of the kept, that was left out by norm
ALTER TABLE texts ADD COLUMN high_variance DOUBLE;    -- share of the kept variance above 2.5 times the median norm
