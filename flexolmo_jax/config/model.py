"""The architecture of a model, and the sizes that come ready-made."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .section import Section, expect

LAYERS = 1024  # the most that a model may have
VOCABULARY = 2**24  # the same
D_HEAD = 2**12  # the same
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
    # SmolLM2-135M
    "smollm2-135m": dict(
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ffn=1536,
        rope_theta=1e5,
        norm_eps=1e-5,
        max_seq_len=8192,
        norm="pre",
        qk_norm="none",
        tied_head=True,
    ),
    # Olmo-3-1025-7B
    "olmo3-7b": dict(
        vocab_size=100278,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        d_ffn=11008,
        max_seq_len=65536,
        window=4096,
        full_every=4,
        rope_scaling=dict(kind="yarn", factor=8.0, first_seq_len=8192),
    ),
    # Llama-3.1-8B
    "llama3.1-8b": dict(
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ffn=14336,
        norm_eps=1e-5,
        max_seq_len=131072,
        norm="pre",
        qk_norm="none",
        rope_scaling=dict(kind="llama3", factor=8.0, first_seq_len=8192),
    ),
    # Qwen3-8B
    "qwen3-8b": dict(
        vocab_size=151936,
        d_model=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        d_ffn=12288,
        rope_theta=1e6,
        max_seq_len=40960,
        norm="pre",
        qk_norm="head",
    ),
}


# Of a key that anchors of earlier versions lack. `to_dict` leaves it out where it has its default,
# so that those keep their fingerprints.
LATER = {"later": True}


def later(default: Any) -> Any:
    return field(default=default, metadata=LATER)


@dataclass(frozen=True)
class RopeScaling(Section):
    """How rotary positions go on beyond the context that a model was first trained for. Names and
    formulas are those of transformers 5.23 (`modeling_rope_utils.py`)."""

    at = "model.rope_scaling"

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0  # the longer context over the first
    first_seq_len: int = 4096  # the first context, in tokens; llama3 and yarn
    low_frequency: float = 1.0  # llama3: slower ones are divided by the factor
    high_frequency: float = 4.0  # llama3: faster ones are kept
    beta_fast: float = 32.0  # yarn: turns in the first context, above which frequencies are kept
    beta_slow: float = 1.0  # yarn: below which they are divided by the factor
    attention_factor: float = 0.0  # yarn: of queries and keys; 0: 1 + 0.1 ln factor

    def check(self) -> None:
        for key in ("factor", "low_frequency", "high_frequency", "beta_fast", "beta_slow"):
            self.expect(key, 0 < getattr(self, key) < math.inf, "a positive, finite number")
        self.expect("factor", self.factor >= 1, "a number from 1 on")
        in_range = 0 < self.first_seq_len <= LARGEST["max_seq_len"]
        self.expect("first_seq_len", in_range, f"a positive number, at most {2**30}")
        is_above = self.high_frequency > self.low_frequency
        self.expect("high_frequency", is_above, f"a number above {self.low_frequency}")
        is_above = self.beta_fast > self.beta_slow
        self.expect("beta_fast", is_above, f"a number above {self.beta_slow}")
        is_factor = 0 <= self.attention_factor < math.inf
        self.expect("attention_factor", is_factor, "a finite number from 0 on")


@dataclass(frozen=True)
class ModelConfig(Section):
    """A decoder with `n_experts` experts in place of each FFN: all that a stranger needs to read
    the weights. The defaults make OLMo 2; other families are other values of the same keys."""

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

    # Norms of attention and FFN: of what comes out (OLMo 2 and 3) or of what goes in (Llama, Qwen).
    norm: Literal["post", "pre"] = later("post")
    # RMSNorm of queries and keys: of a whole projection, of each head, or none
    qk_norm: Literal["full", "head", "none"] = later("full")
    d_head: int = later(0)  # 0: d_model / n_heads
    tied_head: bool = later(False)  # logits come from the embedding; there is no other head
    attention_bias: bool = later(False)  # of queries, keys and values (Qwen 2)
    renormalise: bool = later(False)  # the weights of a token's active experts add up to 1
    rope_scaling: RopeScaling | None = field(default=None, metadata=LATER)
    window: int = later(0)  # tokens that a token sees, itself included; 0: its whole document
    # With a window: each n-th layer sees whole documents, and `rope_scaling` is of these layers
    # alone. 0: every layer has the window.
    full_every: int = later(0)
    window_rope_theta: float = later(0.0)  # of the layers with a window; 0: rope_theta

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    def has_window(self, layer: int) -> bool:
        return self.window > 0 and not (self.full_every and (layer + 1) % self.full_every == 0)

    def check(self) -> None:
        for key, most in LARGEST.items():
            self.expect(key, 0 < getattr(self, key) <= most, f"a positive number, at most {most}")
        in_range = 0 <= self.vocab_size <= VOCABULARY
        self.expect("vocab_size", in_range, f"a number from 0 to {VOCABULARY}")
        for key in ("rope_theta", "norm_eps", "init_std"):
            self.expect(key, 0 < getattr(self, key) < math.inf, "a positive, finite number")
        self.expect("init_bias", math.isfinite(self.init_bias), "a finite number")
        self.expect("d_head", 0 <= self.d_head <= D_HEAD, f"a number from 0 to {D_HEAD}")
        divides = self.d_head > 0 or self.d_model % self.n_heads == 0
        self.expect("n_heads", divides, f"a divisor of model.d_model ({self.d_model})")
        # Rotary positions turn the halves of a head against each other.
        is_even = self.head_size % 2 == 0
        size = "model.d_head" if self.d_head else "model.d_model / model.n_heads"
        expect(is_even, size, self.head_size, "an even head size (rotary positions)")
        divides = self.n_heads % self.n_kv_heads == 0
        self.expect("n_kv_heads", divides, f"a divisor of n_heads ({self.n_heads})")
        are_there = self.n_active <= self.n_experts
        self.expect("n_active", are_there, f"at most model.n_experts ({self.n_experts})")
        self._check_windows()
        if self.rope_scaling is not None:
            self.rope_scaling.check()

    def _check_windows(self) -> None:
        most = LARGEST["max_seq_len"]
        self.expect("window", 0 <= self.window <= most, f"a number from 0 to {most}")
        self.expect("full_every", 0 <= self.full_every <= LAYERS, f"a number from 0 to {LAYERS}")
        theta = self.window_rope_theta
        is_theta = 0 <= theta < math.inf
        self.expect("window_rope_theta", is_theta, "a finite number from 0 on")
        for key in ("full_every", "window_rope_theta"):
            fits = self.window > 0 or not getattr(self, key)
            self.expect(key, fits, "0, since model.window is 0")
        fits = self.full_every > 0 or not theta
        self.expect("window_rope_theta", fits, "0, since model.full_every is 0")
