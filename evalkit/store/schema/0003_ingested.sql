-- How far each run's journal has been read; the latest row counts. A journal whose first line is another has been replaced.

CREATE TABLE ingested (
    run_id VARCHAR,             -- name of the run's folder
    records BIGINT,             -- whole records read
    bytes BIGINT,               -- where the next one begins
    first_line VARCHAR          -- sha256 of the first record as written
);
