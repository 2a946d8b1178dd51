"""How this program and every process that it starts behave: silent and without telemetry."""

QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_LOG_LEVEL": "error",
    # worker threads that wait must not burn the cores that others need
    "OMP_WAIT_POLICY": "PASSIVE",
}
