"""Checks before the first step: do this student and these labels speak about the same tokens?

Everything that is wrong is found and reported at once, each thing in one sentence with a way out.
No weights are loaded. To add a check, write a module here that returns findings, and name it in
``checks.py``.

| module | what it does |
|---|---|
| ``findings`` | what a check says; refusing |
| ``subject`` | what is known of student, teacher and labels |
| ``vocabulary`` | token ids, special tokens, rows of the embedding |
| ``template`` | chat templates, by what they write |
| ``ends`` | how texts begin and responses end |
| ``room`` | context length and memory |
| ``checks`` | which checks can be made before and after labelling |
| ``before_training`` | the checks as a rank of a training makes them |
| ``self_test`` | the teacher as its own student: a loss near 0 |
| ``command`` | both, printed by ``python -m student_train`` |
"""
