-- What text a run read: one row for each side and hook point. A run that was gone on with may say the same again.

CREATE TABLE texts (
    run_id VARCHAR,
    side VARCHAR,               -- fit | score
    hook_point VARCHAR,
    bos VARCHAR,                -- token that every window begins with, '' for none
    context BIGINT,             -- tokens a window
    asked BIGINT,               -- tokens asked for
    tokens BIGINT,              -- tokens had: all windows
    documents BIGINT,           -- documents that gave windows
    too_short BIGINT,           -- documents tried that hold no window
    kept BIGINT,                -- positions that are fitted or scored on
    left_bos BIGINT,            -- positions left out: the BOS
    left_first BIGINT,          -- positions left out: among the first of a window
    left_massive BIGINT         -- positions left out: norm above the limit
);

CREATE VIEW dictionary_texts AS            -- what each dictionary's file says of itself, beside the text its units were measured on
SELECT DISTINCT u.run_id, u.evaluation, u.unit_order, u.dictionary, d.details, t.bos, t.context
FROM run_units u
JOIN dictionaries d ON d.dictionary_id = u.dictionary_id
JOIN texts t ON t.run_id = u.run_id AND t.hook_point = u.hook_point AND t.side = 'score'
WHERE d.details IS NOT NULL;
