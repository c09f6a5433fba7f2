-- How facts are read. A status is the latest row of its thing; a run's number for something is that of its latest unit.

CREATE VIEW run_states AS                  -- one row a run: its latest state
SELECT run_id, suite, status, "at" AS last_at, first_at, evalkit_version, packages, machine, suite_toml
FROM (
    SELECT run_id, suite, status, "at", evalkit_version, packages, machine, suite_toml,
           min("at") OVER (PARTITION BY run_id) AS first_at,
           row_number() OVER (PARTITION BY run_id ORDER BY "at" DESC NULLS LAST, rowid DESC) AS place
    FROM runs
)
WHERE place = 1;

CREATE VIEW run_units AS                   -- one row for each unit of each run: its latest state
SELECT unit_key, run_id, evaluation, evaluation_version, dictionary, dictionary_id, hook_point, seed, judge, config,
       status, error, seconds, finished_at, unit_order
FROM (
    SELECT unit_key, run_id, evaluation, evaluation_version, dictionary, dictionary_id, hook_point, seed, judge, config,
           status, error, seconds, "at" AS finished_at,
           min(rowid) OVER (PARTITION BY run_id, evaluation, dictionary, hook_point, seed, config) AS unit_order,
           row_number() OVER (
               PARTITION BY run_id, evaluation, dictionary, hook_point, seed, config ORDER BY "at" DESC NULLS LAST, rowid DESC
           ) AS place
    FROM units
)
WHERE place = 1;

CREATE VIEW latest_runs AS                 -- for each evaluation, the run that worked on it last
SELECT evaluation, run_id, last_at
FROM (
    SELECT evaluation, run_id, last_at,
           row_number() OVER (PARTITION BY evaluation ORDER BY last_at DESC NULLS LAST, last_row DESC) AS place
    FROM (
        SELECT u.evaluation, u.run_id, max(greatest(u."at", coalesce(r.last_at, u."at"))) AS last_at, max(u.rowid) AS last_row
        FROM units u LEFT JOIN run_states r ON r.run_id = u.run_id
        GROUP BY u.evaluation, u.run_id
    )
)
WHERE place = 1;

CREATE VIEW latest_units AS                -- the units of the latest run of each evaluation
SELECT u.unit_key, u.run_id, u.evaluation, u.evaluation_version, u.dictionary, u.dictionary_id, u.hook_point, u.seed,
       u.judge, u.config, u.status, u.error, u.seconds, u.finished_at, u.unit_order
FROM run_units u JOIN latest_runs l ON l.evaluation = u.evaluation AND l.run_id = u.run_id;

CREATE VIEW latest_scores AS               -- their scores, with what they are about
SELECT u.run_id, u.evaluation, u.dictionary, u.hook_point, u.seed AS unit_seed, u.config, u.judge, s.unit_key,
       s.metric, s.kind, s.item, s.cluster, s.value, s.weight, s.status, s.n, s.seed
FROM latest_units u JOIN scores s ON s.unit_key = u.unit_key
WHERE u.status = 'done';

CREATE VIEW metric_descriptions AS         -- one row a metric: its latest description
SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
       digits, main, note
FROM (
    SELECT evaluation, evaluation_version, metric, position, title, better, chance, null_metric, transform, has_interval,
           digits, main, note,
           row_number() OVER (PARTITION BY evaluation, evaluation_version, metric ORDER BY rowid DESC) AS place
    FROM metrics
)
WHERE place = 1;

CREATE VIEW coverage AS                    -- how many items stand behind each mean
SELECT evaluation, dictionary, hook_point, metric,
       count(*) FILTER (WHERE status = 'ok') AS ok,
       count(*) FILTER (WHERE status = 'failed') AS failed,
       count(*) FILTER (WHERE status = 'undefined') AS undefined
FROM latest_scores
GROUP BY evaluation, dictionary, hook_point, metric;

-- SELECT * FROM compare('topk', 'pca'): weighted means of two dictionaries, and over the items both have.
-- For intervals and p-values: evalkit compare A B.
CREATE MACRO compare(first_name, second_name) AS TABLE
WITH sides AS (
    SELECT evaluation, hook_point, config, metric, kind, item, unit_seed, seed, dictionary, value, weight
    FROM latest_scores
    WHERE status = 'ok' AND dictionary IN (first_name, second_name)
), means AS (
    SELECT evaluation, hook_point, config, metric,
           sum(value * weight) FILTER (WHERE dictionary = first_name)
               / nullif(sum(weight) FILTER (WHERE dictionary = first_name), 0) AS mean_a,
           sum(value * weight) FILTER (WHERE dictionary = second_name)
               / nullif(sum(weight) FILTER (WHERE dictionary = second_name), 0) AS mean_b,
           count(*) FILTER (WHERE dictionary = first_name) AS n_a,
           count(*) FILTER (WHERE dictionary = second_name) AS n_b
    FROM sides
    GROUP BY evaluation, hook_point, config, metric
), windows AS (
    SELECT x.evaluation, x.hook_point, x.config, x.metric, count(*) AS n_pairs,
           sum(x.value * x.weight) / nullif(sum(x.weight), 0) - sum(y.value * y.weight) / nullif(sum(y.weight), 0) AS paired_difference
    FROM sides x JOIN sides y
      ON y.evaluation = x.evaluation AND y.hook_point = x.hook_point AND y.config IS NOT DISTINCT FROM x.config
     AND y.metric = x.metric AND y.kind = x.kind AND y.item = x.item AND y.unit_seed = x.unit_seed AND y.seed = x.seed
    WHERE x.kind = 'window' AND x.dictionary = first_name AND y.dictionary = second_name
    GROUP BY x.evaluation, x.hook_point, x.config, x.metric
)
SELECT m.evaluation, m.hook_point, m.metric, m.mean_a, m.mean_b, m.mean_a - m.mean_b AS difference, m.n_a, m.n_b,
       w.n_pairs, w.paired_difference, m.config
FROM means m
LEFT JOIN windows w
  ON w.evaluation = m.evaluation AND w.hook_point = m.hook_point AND w.config IS NOT DISTINCT FROM m.config AND w.metric = m.metric
WHERE m.n_a > 0 AND m.n_b > 0;

CREATE VIEW run_list AS                    -- every run with its state and how many units it finished
SELECT r.run_id, r.suite, r.status, r.first_at, r.last_at, r.evalkit_version,
       count(u.unit_key) FILTER (WHERE u.status = 'done') AS units_done,
       count(u.unit_key) FILTER (WHERE u.status = 'failed') AS units_failed
FROM run_states r LEFT JOIN run_units u ON u.run_id = r.run_id
GROUP BY r.run_id, r.suite, r.status, r.first_at, r.last_at, r.evalkit_version;

CREATE VIEW dictionary_list AS             -- every dictionary with the names suites gave it
SELECT (SELECT string_agg(DISTINCT u.dictionary, ', ') FROM units u WHERE u.dictionary_id = d.dictionary_id) AS names,
       d.kind, d.hook_point, d.model, d.d_in, d.n_features, d.dictionary_id, d.details
FROM (
    SELECT dictionary_id, kind, hook_point, model, d_in, n_features, details,
           row_number() OVER (PARTITION BY dictionary_id ORDER BY rowid DESC) AS place
    FROM dictionaries
) d
WHERE d.place = 1;

CREATE VIEW failure_list AS                -- what failed and is missing
SELECT run_id, 'unit' AS what, evaluation, dictionary, hook_point, 1 AS failed, error
FROM run_units WHERE status = 'failed'
UNION ALL
SELECT u.run_id, 'explanation', u.evaluation, u.dictionary, u.hook_point, count(*), any_value(e.error)
FROM run_units u JOIN explanations e ON e.unit_key = u.unit_key
WHERE e.status = 'failed' AND u.status = 'done'
GROUP BY u.run_id, u.evaluation, u.dictionary, u.hook_point
UNION ALL
SELECT u.run_id, 'score: ' || s.metric, u.evaluation, u.dictionary, u.hook_point, count(*), NULL
FROM run_units u JOIN scores s ON s.unit_key = u.unit_key
WHERE s.status = 'failed' AND u.status = 'done'
GROUP BY u.run_id, s.metric, u.evaluation, u.dictionary, u.hook_point
UNION ALL
SELECT run_id, 'judge call: ' || purpose, NULL, NULL, NULL, count(*), error
FROM judge_calls WHERE status = 'failed'
GROUP BY run_id, purpose, error;

CREATE VIEW cost_list AS                   -- judge calls, tokens, dollars and seconds
SELECT run_id, judge, purpose, count(*) AS calls, count(*) FILTER (WHERE status = 'failed') AS failed,
       CAST(sum(prompt_tokens) AS BIGINT) AS prompt_tokens, CAST(sum(completion_tokens) AS BIGINT) AS completion_tokens,
       sum(dollars) AS dollars, sum(seconds) AS seconds
FROM judge_calls
GROUP BY run_id, judge, purpose;
