"""NATTEN's switches between its kernels: remembered and answered, but there is nothing to switch."""

import enum
from collections.abc import Callable

import torch

# What a switch says before anyone has used it.
_DEFAULTS = {
    "fused_na": False,
    "flex_attention": False,
    "kv_parallelism_in_fused_na": True,
    "gemm_na": True,
    "tiled_na": True,
    "tf32_in_gemm_na": True,
    "autotuner_for_forward": False,
    "autotuner_for_backward": False,
    "autotuner_thorough_for_forward": False,
    "autotuner_thorough_for_backward": False,
    "deterministic_algorithms": False,
    "flex_compile": False,
    "flex_compile_backprop": False,
}


class MemoryUsagePreference(enum.Enum):
    """How much memory NATTEN's backward pass might use."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class Switches:
    """The switches of one release, under NATTEN's names."""

    def __init__(self):
        self._on = dict(_DEFAULTS)
        self._memory = MemoryUsagePreference.Default

    def has_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_half(self, device_index: int | None = None) -> bool:
        return True

    has_bfloat = has_fna = has_fused_na = has_half

    def has_gemm(self, device_index: int | None = None) -> bool:
        """Return False: no choice of NATTEN's matrix kernels changes anything here."""
        return False

    has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm

    def _set(self, name: str, mode: bool) -> bool:
        self._on[name] = bool(mode)
        return self._on[name]

    def use_fused_na(
        self,
        mode: bool = True,
        kv_parallel: bool = True,
        use_flex_attention: bool = False,
        force_flex_attention: bool = False,
    ) -> None:
        self._set("fused_na", mode)
        self._set("kv_parallelism_in_fused_na", kv_parallel)
        self._set("flex_attention", use_flex_attention or force_flex_attention)

    use_fna = use_fused_na

    def is_fused_na_enabled(self) -> bool:
        return self._on["fused_na"]

    is_fna_enabled = is_fused_na_enabled

    def use_flex_attention(self, mode: bool = True) -> None:
        self._set("flex_attention", mode)

    force_flex_attention = use_flex_attention

    def use_kv_parallelism_in_fused_na(self, mode: bool = True) -> None:
        self._set("kv_parallelism_in_fused_na", mode)

    def is_kv_parallelism_in_fused_na_enabled(self) -> bool:
        return self._on["kv_parallelism_in_fused_na"]

    def use_gemm_na(self, mode: bool = True) -> None:
        self._set("gemm_na", mode)

    def is_gemm_na_enabled(self) -> bool:
        return self._on["gemm_na"]

    def use_tiled_na(self, mode: bool = True) -> None:
        self._set("tiled_na", mode)

    def is_tiled_na_enabled(self) -> bool:
        return self._on["tiled_na"]

    def use_tf32_in_gemm_na(self, mode: bool = True) -> None:
        self._set("tf32_in_gemm_na", mode)

    def is_tf32_in_gemm_na_enabled(self) -> bool:
        return self._on["tf32_in_gemm_na"]

    def enable_tf32(self) -> bool:
        return self._set("tf32_in_gemm_na", True)

    def disable_tf32(self) -> bool:
        return self._set("tf32_in_gemm_na", False)

    def enable_gemm_na(self) -> bool:
        return self._set("gemm_na", True)

    def disable_gemm_na(self) -> bool:
        return self._set("gemm_na", False)

    def enable_tiled_na(self) -> bool:
        return self._set("tiled_na", True)

    def disable_tiled_na(self) -> bool:
        return self._set("tiled_na", False)

    def use_autotuner(
        self,
        forward_pass: bool | None = None,
        backward_pass: bool | None = None,
        thorough_mode_forward: bool | None = None,
        thorough_mode_backward: bool | None = None,
        warmup_steps_forward: int | None = None,
        warmup_steps_backward: int | None = None,
        steps_forward: int | None = None,
        steps_backward: int | None = None,
    ) -> None:
        given = {
            "autotuner_for_forward": forward_pass,
            "autotuner_for_backward": backward_pass,
            "autotuner_thorough_for_forward": thorough_mode_forward,
            "autotuner_thorough_for_backward": thorough_mode_backward,
        }
        self._on |= {name: mode for name, mode in given.items() if mode is not None}

    def disable_autotuner(self) -> None:
        self._on |= {name: False for name in self._on if name.startswith("autotuner")}

    def is_autotuner_enabled(self) -> bool:
        return self._on["autotuner_for_forward"] or self._on["autotuner_for_backward"]

    def is_autotuner_enabled_for_forward(self) -> bool:
        return self._on["autotuner_for_forward"]

    def is_autotuner_enabled_for_backward(self) -> bool:
        return self._on["autotuner_for_backward"]

    def is_autotuner_thorough_for_forward(self) -> bool:
        return self._on["autotuner_thorough_for_forward"]

    def is_autotuner_thorough_for_backward(self) -> bool:
        return self._on["autotuner_thorough_for_backward"]

    def use_deterministic_algorithms(self, mode: bool = True) -> None:
        self._set("deterministic_algorithms", mode)

    def are_deterministic_algorithms_enabled(self) -> bool:
        return self._on["deterministic_algorithms"]

    def set_memory_usage_preference(self, pref: str = "default") -> None:
        by_name = {each.name.lower(): each for each in MemoryUsagePreference}
        if pref not in by_name:
            raise ValueError(f"a memory usage preference is one of {', '.join(map(repr, by_name))}; got {pref!r}")
        self._memory = by_name[pref]

    def get_memory_usage_preference(self) -> MemoryUsagePreference:
        return self._memory

    def is_memory_usage_default(self) -> bool:
        return self._memory == MemoryUsagePreference.Default

    def is_memory_usage_strict(self) -> bool:
        return self._memory == MemoryUsagePreference.Strict

    def is_memory_usage_unrestricted(self) -> bool:
        return self._memory == MemoryUsagePreference.Unrestricted

    def allow_flex_compile(self, mode: bool = True, backprop: bool = False) -> None:
        self._set("flex_compile", mode)
        self._set("flex_compile_backprop", backprop)

    def allow_flex_compile_backprop(self, mode: bool = True) -> None:
        self._set("flex_compile_backprop", mode)

    def disable_flex_compile(self) -> None:
        self.allow_flex_compile(False)

    def disable_flex_compile_backprop(self) -> None:
        self._set("flex_compile_backprop", False)

    def is_flex_compile_allowed(self) -> bool:
        return self._on["flex_compile"]

    def is_flex_compile_backprop_allowed(self) -> bool:
        return self._on["flex_compile_backprop"]

    def named(self, *names: str) -> dict[str, Callable]:
        """Return some of the switches by name."""
        return {name: getattr(self, name) for name in names}


_HAS_GEMM = ("has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm")
_TOGGLES = ("enable_tf32", "disable_tf32", "enable_gemm_na", "disable_gemm_na", "enable_tiled_na", "disable_tiled_na")
# By the release that brought them.
SINCE_015 = ("has_cuda", "has_half", "has_bfloat", *_HAS_GEMM, *_TOGGLES)
SINCE_017 = (
    *("has_fna", "has_fused_na", "use_fna", "use_fused_na", "is_fna_enabled", "is_fused_na_enabled"),
    *("use_gemm_na", "use_tiled_na", "use_tf32_in_gemm_na"),
    *("is_gemm_na_enabled", "is_tiled_na_enabled", "is_tf32_in_gemm_na_enabled"),
    *("use_autotuner", "disable_autotuner", "is_autotuner_enabled"),
    *("is_autotuner_enabled_for_forward", "is_autotuner_enabled_for_backward"),
    *("is_autotuner_thorough_for_forward", "is_autotuner_thorough_for_backward"),
)
SINCE_0175 = ("use_flex_attention", "force_flex_attention")
KEPT = (
    *("use_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
    *("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled"),
    *("set_memory_usage_preference", "get_memory_usage_preference"),
    *("is_memory_usage_default", "is_memory_usage_strict", "is_memory_usage_unrestricted"),
)
SINCE_020 = (
    *("allow_flex_compile", "disable_flex_compile", "is_flex_compile_allowed"),
    *("allow_flex_compile_backprop", "disable_flex_compile_backprop", "is_flex_compile_backprop_allowed"),
)
