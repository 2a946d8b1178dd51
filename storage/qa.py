"""Settings of the check that ends in a certificate. No heavy import: configurations hold them."""

from pydantic import Field

from storage.config import Config


class QaConfig(Config):
    """How a label set is checked once it has been labelled, and when it is refused."""

    enabled: bool = True
    """Whether labelling ends with a certificate. ``distill certify`` makes one anyway."""
    samples: int = Field(default=32, ge=1)
    """Samples that transformers scores again; the check ends at this number or at ``rows``. A
    mistake in a share f of all samples is missed with probability (1 - f)**samples."""
    rows: int = Field(default=2048, ge=1)
    """Label rows after which no further sample is scored again."""
    drawn_rows: int = Field(default=2**16, ge=1)
    """Label rows on which sampled tokens are tested against the stored distributions; reads labels
    only, no model."""
    seed: int = Field(default=0, ge=0)
    """Another seed looks at other samples."""
    float32: float = Field(default=1e-4, gt=0)
    """Largest difference x - y between engine and transformers, both in float32, in proportion to
    1 + |y|. Raise it only for a model so deep that its kernels differ by more."""
    noise_factor: float = Field(default=2.0, ge=1)
    """How much further from float32 than transformers in the same dtype labels in bfloat16 or
    float16 may be. Raise it only for an engine whose kernels are known to be less exact."""
    max_kl: float = Field(default=0.1, gt=0)
    """Largest mean KL of a sample in nats per position, however noisy the dtype is."""
    min_p_value: float = Field(default=1e-6, gt=0, lt=1)
    """Sampled tokens are refused if correct ones look so strange with this probability or less: the
    share of good label sets that each of two tests refuses by mistake."""
