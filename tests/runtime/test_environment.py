"""JAX's settings that other programs have: those under which nothing here can run are named."""

import re
from pathlib import Path

import jax
import pytest

import flexolmo_jax
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.environment import check, random_key

SETTINGS = [
    ("jax_enable_x64", True),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_random_seed_offset", 7),
    ("jax_threefry_partitionable", False),
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
    check({"JAX_RANDOM_SEED_OFFSET": "0", "JAX_THREEFRY_PARTITIONABLE": "true"})


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_python_users_setting_under_which_nothing_can_run_is_named(name, value, model):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(UserError, match=rf"^jax.config.{name} is {value!r}; expected .*update"):
            flexolmo_jax.load(model)
    finally:
        jax.config.update(name, before)


def test_random_numbers_are_the_same_whatever_generator_is_jaxs_default():
    draw = jax.jit(lambda seed: jax.random.normal(random_key(seed), (4,)))
    usual = draw(3)
    with jax.default_prng_impl("rbg"):
        assert (draw(3) == usual).all()
        assert (jax.random.normal(jax.random.key(3), (4,)) != usual).any()


def test_every_random_number_begins_at_that_generator():
    package = Path(flexolmo_jax.__file__).parent
    begins = {
        str(path.relative_to(package)): len(found)
        for path in package.rglob("*.py")
        if (found := re.findall(r"random\.(?:key|PRNGKey)\((?!0\))", path.read_text()))
    }
    assert begins == {"runtime/environment.py": 1}
