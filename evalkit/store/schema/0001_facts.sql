-- Append-only facts. No defaults, keys, indexes or foreign keys: a file killed at any moment must open again, and the
-- journals of the runs, not this file, are the truth. A change of status is a new row.

CREATE TABLE runs (
    run_id VARCHAR,             -- suite name and hash of its contents
    suite VARCHAR,              -- [suite] name
    status VARCHAR,             -- started | done | partial | budget | interrupted | failed; the latest row counts
    "at" TIMESTAMP,               -- UTC
    evalkit_version VARCHAR,
    packages VARCHAR,           -- JSON: versions of the packages that can change a number
    machine VARCHAR,            -- JSON: processor, cores, accelerator, dtype
    suite_toml VARCHAR          -- the suite file as it was
);

CREATE TABLE dictionaries (
    dictionary_id VARCHAR,      -- hash of weights, kind and settings
    kind VARCHAR,
    hook_point VARCHAR,
    model VARCHAR,
    d_in BIGINT,
    n_features BIGINT,
    details VARCHAR             -- JSON: how it came to be
);

CREATE TABLE metrics (
    evaluation VARCHAR, evaluation_version BIGINT, metric VARCHAR, position BIGINT,
    title VARCHAR, better VARCHAR, chance DOUBLE, null_metric VARCHAR, transform VARCHAR,
    has_interval BOOLEAN, digits BIGINT, main BOOLEAN, note VARCHAR
);

CREATE TABLE units (
    unit_key VARCHAR,           -- hash of everything that can change the rows
    run_id VARCHAR,
    evaluation VARCHAR,
    evaluation_version BIGINT,
    dictionary VARCHAR,         -- name in the suite
    dictionary_id VARCHAR,
    hook_point VARCHAR,
    seed BIGINT,
    judge VARCHAR,              -- short name; NULL where none was asked
    config VARCHAR,             -- JSON
    status VARCHAR,             -- done | failed
    error VARCHAR,
    seconds DOUBLE,
    "at" TIMESTAMP
);

CREATE TABLE scores (
    unit_key VARCHAR,
    metric VARCHAR,
    kind VARCHAR,               -- what item counts: feature | window | dictionary
    item BIGINT,
    cluster BIGINT,             -- items resampled together; NULL: each on its own
    value DOUBLE,               -- NULL unless status is 'ok'
    weight DOUBLE,
    status VARCHAR,             -- ok | undefined | failed
    n BIGINT,
    seed BIGINT
);

CREATE TABLE explanations (
    unit_key VARCHAR,
    feature BIGINT,
    judge VARCHAR,
    explanation VARCHAR,
    status VARCHAR,
    error VARCHAR,
    density DOUBLE,             -- share of the kept scoring tokens it fires on
    max_activation DOUBLE,
    top_tokens VARCHAR          -- JSON: tokens at its strongest activations
);

CREATE TABLE predictions (
    unit_key VARCHAR,
    feature BIGINT,
    judge VARCHAR,
    explained_by VARCHAR,       -- own | shuffled
    part VARCHAR,               -- explain | top | random
    fragment BIGINT,
    document BIGINT,
    tokens VARCHAR[],
    actual DOUBLE[],
    predicted DOUBLE[],         -- NULL where the call failed
    digit_mass DOUBLE[],        -- NULL where unknown
    status VARCHAR
);

CREATE TABLE judge_calls (
    call_key VARCHAR,
    run_id VARCHAR,
    purpose VARCHAR,            -- explain | simulate
    judge VARCHAR,
    prompt_tokens BIGINT,       -- NULL where the server does not say
    completion_tokens BIGINT,
    dollars DOUBLE,
    seconds DOUBLE,
    attempts BIGINT,
    status VARCHAR,             -- ok | failed | retried (failed, and asked again in the same run)
    error VARCHAR,
    "at" TIMESTAMP
);
