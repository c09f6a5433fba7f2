-- Causal trees: how an ablated feature was come to, what the correction is for, and which contexts are weak.
-- From version 6 of causal_tree on: causal_edges.p_holm is corrected for causal_nodes.candidates, the features active in at least
-- least_active contexts; causal_edges.checked and causal_nodes.checked count those next in size too; causal_nodes.random is about the
-- strongest cause, significant or not; causal_nodes.together is 0 where there are no parents.

ALTER TABLE causal_edges ADD COLUMN proposed_as VARCHAR;  -- tested: by the gradient | next: checked, the next by the size of the estimate | drawn: checked, drawn at random
ALTER TABLE causal_nodes ADD COLUMN present BIGINT;       -- features of the hook point before that are active in any context; candidates (what p_holm is corrected for) are active in least_active of them
ALTER TABLE causal_nodes ADD COLUMN weak BIGINT;          -- of the contexts, those in which the feature lies below level of its maximum
ALTER TABLE causal_nodes ADD COLUMN top_share DOUBLE;     -- part of all loss that the three largest ablated features make
ALTER TABLE causal_nodes ADD COLUMN explanation VARCHAR;  -- by the suite's judge; NULL where it was not asked or failed
ALTER TABLE causal_nodes ADD COLUMN explained_by VARCHAR; -- the judge; NULL where it was not asked
