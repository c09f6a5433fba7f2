-- A bound below which a mean is flagged, and the sentence that says what it means then; NULL where a metric has none.

ALTER TABLE metrics ADD COLUMN flag_below DOUBLE;
ALTER TABLE metrics ADD COLUMN flag VARCHAR;

CREATE OR REPLACE VIEW metric_descriptions AS
SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
       digits, main, note, flag_below, flag
FROM (
    SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
           digits, main, note, flag_below, flag,
           row_number() OVER (PARTITION BY evaluation, evaluation_version, metric ORDER BY rowid DESC) AS place
    FROM metrics
)
WHERE place = 1;
