-- The least and the largest value a metric can have, NULL where there is none: no interval leaves them.

ALTER TABLE metrics ADD COLUMN lowest DOUBLE;
ALTER TABLE metrics ADD COLUMN highest DOUBLE;

CREATE OR REPLACE VIEW metric_descriptions AS
SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
       digits, main, note, flag_below, flag, lowest, highest
FROM (
    SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
           digits, main, note, flag_below, flag, lowest, highest,
           row_number() OVER (PARTITION BY evaluation, evaluation_version, metric ORDER BY rowid DESC) AS place
    FROM metrics
)
WHERE place = 1;
