"""JAX's settings that other programs have: those under which nothing here can run are named."""

import jax
import pytest

import flexolmo_jax
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.environment import check

SETTINGS = [
    ("jax_enable_x64", True),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_transfer_guard", "disallow"),
    ("jax_transfer_guard_host_to_device", "disallow"),
    ("jax_transfer_guard_device_to_host", "disallow_explicit"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_variable_under_which_nothing_can_run_is_named_with_its_value(name, value):
    with pytest.raises(UserError, match=f"^{name.upper()} is '{value}'; expected .*; unset it$"):
        check({name.upper(): str(value)})


def test_a_variable_that_says_what_is_the_default_is_taken():
    check({"JAX_ENABLE_X64": "0", "JAX_NUMPY_RANK_PROMOTION": "warn", "JAX_TRANSFER_GUARD": "log"})


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_python_users_setting_under_which_nothing_can_run_is_named(name, value, model):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=rf"^jax.config.{name} is {value!r}; expected .*update"):
            flexolmo_jax.load(model)
    finally:
        jax.config.update(name, before)
