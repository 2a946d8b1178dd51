"""Teacher backends: what runs the model.

To add one, write ``<name>.py`` here and add one line to ``BACKENDS``. Its options are a config
class in ``teacher_server/config.py`` (one more member of ``BackendConfig``), its tests
``tests/integration/test_<name>_backend.py``. The values are import strings, so listing the names
does not import vllm or torch.
"""

BACKENDS = {
    "vllm": "teacher_server.backends.vllm_engine:VllmBackend",
    "transformers": "teacher_server.backends.transformers_reference:TransformersBackend",
    "fake": "teacher_server.backends.fake:FakeBackend",
}
