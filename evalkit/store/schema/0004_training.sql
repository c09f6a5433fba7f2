-- How dictionaries learned: the rows of each training run's history.

CREATE TABLE training_steps (
    run_id VARCHAR,
    dictionary VARCHAR,         -- name in the suite
    recipe VARCHAR,             -- name of the dictionary's folder: suite name and hash of everything that determines its weights
    hook_point VARCHAR,
    step BIGINT,                -- the last step behind the means
    tokens BIGINT,              -- activations presented by then
    loss DOUBLE,                -- mean since the row before; so are fvu and l0
    fvu DOUBLE,
    l0 DOUBLE,
    dead_share DOUBLE,          -- at that step
    tokens_per_second DOUBLE,
    "at" TIMESTAMP
);

CREATE VIEW training_curves AS             -- one row a step of each recipe: the latest
SELECT run_id, dictionary, recipe, hook_point, step, tokens, loss, fvu, l0, dead_share, tokens_per_second, recorded_at
FROM (
    SELECT run_id, dictionary, recipe, hook_point, step, tokens, loss, fvu, l0, dead_share, tokens_per_second,
           "at" AS recorded_at,
           row_number() OVER (PARTITION BY recipe, step ORDER BY "at" DESC NULLS LAST, rowid DESC) AS place
    FROM training_steps
)
WHERE place = 1;

CREATE OR REPLACE VIEW dictionary_list AS  -- every dictionary with the names suites gave it
SELECT coalesce(
           (SELECT string_agg(DISTINCT u.dictionary, ', ') FROM units u WHERE u.dictionary_id = d.dictionary_id),
           json_extract_string(d.details, '$.name')
       ) AS names,
       d.kind, d.hook_point, d.model, d.d_in, d.n_features, d.dictionary_id, d.details
FROM (
    SELECT dictionary_id, kind, hook_point, model, d_in, n_features, details,
           row_number() OVER (PARTITION BY dictionary_id ORDER BY rowid DESC) AS place
    FROM dictionaries
) d
WHERE d.place = 1;
