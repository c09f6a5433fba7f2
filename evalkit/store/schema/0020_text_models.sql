-- The model that read a text, to hold against the one a dictionary was made for. Side 'stream': text that trainers were streamed,
-- whose positions are not counted (kept and left_* are NULL).

ALTER TABLE texts ADD COLUMN model VARCHAR;          -- as the suite names it; NULL in earlier runs
ALTER TABLE texts ADD COLUMN model_identity VARCHAR; -- of its weights and number format

CREATE OR REPLACE VIEW dictionary_texts AS -- what each dictionary's file says of itself, beside the text its units were measured on
SELECT DISTINCT u.run_id, u.evaluation, u.unit_order, u.dictionary, d.details, d.model AS made_for, t.bos, t.context, t.model,
       t.model_identity
FROM run_units u
JOIN dictionaries d ON d.dictionary_id = u.dictionary_id
JOIN texts t ON t.run_id = u.run_id AND t.hook_point = u.hook_point AND t.side = 'score'
WHERE d.details IS NOT NULL;
