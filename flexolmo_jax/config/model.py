"""The architecture of a model, and the sizes that come ready-made."""

import math
from dataclasses import dataclass
from typing import Any

from .section import Section, expect

LAYERS = 1024  # the most that a model may have
VOCABULARY = 2**24  # the same
# The most that a model of ours, or of a stranger, may have. No real one comes near; what is beyond
# would only fill memory.
LARGEST = {
    "d_model": 2**17,
    "n_layers": LAYERS,
    "n_heads": 2**13,
    "n_kv_heads": 2**13,
    "d_ffn": 2**20,
    "n_experts": 4096,
    "n_active": 4096,
    "max_seq_len": 2**30,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    # OLMo-2-0425-1B
    "1b": dict(vocab_size=100352, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, d_ffn=8192),
    # OLMo-2-1124-7B
    "7b": dict(
        vocab_size=100352, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ffn=11008
    ),
}


@dataclass(frozen=True)
class ModelConfig(Section):
    """OLMo 2 with `n_experts` experts in place of each FFN: all that a stranger needs to read the
    weights."""

    at = "model"

    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 128
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 8
    d_ffn: int = 688
    n_experts: int = 1  # the anchor's included; 1 is a dense model
    n_active: int = 1  # experts a token uses (k)
    # experts other than the anchor's have a bias <= 0; HF's format has no place for it
    router_bias: bool = True
    init_bias: float = -0.01  # just below 0: min(b, 0) has no gradient above
    rope_theta: float = 5e5
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_seq_len: int = 4096

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def check(self) -> None:
        for key, most in LARGEST.items():
            self.expect(key, 0 < getattr(self, key) <= most, f"a positive number, at most {most}")
        in_range = 0 <= self.vocab_size <= VOCABULARY
        self.expect("vocab_size", in_range, f"a number from 0 to {VOCABULARY}")
        for key in ("rope_theta", "norm_eps", "init_std"):
            self.expect(key, 0 < getattr(self, key) < math.inf, "a positive, finite number")
        self.expect("init_bias", math.isfinite(self.init_bias), "a finite number")
        divides = self.d_model % self.n_heads == 0
        self.expect("n_heads", divides, f"a divisor of model.d_model ({self.d_model})")
        # Rotary positions turn the halves of a head against each other.
        is_even, size = self.d_head % 2 == 0, "model.d_model / model.n_heads"
        expect(is_even, size, self.d_head, "an even head size (rotary positions)")
        divides = self.n_heads % self.n_kv_heads == 0
        self.expect("n_kv_heads", divides, f"a divisor of n_heads ({self.n_heads})")
        are_there = self.n_active <= self.n_experts
        self.expect("n_active", are_there, f"at most model.n_experts ({self.n_experts})")
