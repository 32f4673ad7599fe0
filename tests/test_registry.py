"""The model registry."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import models
from models.registry import get_builder, register_model


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'dn_dab_detr' is registered twice"):
        register_model("dn_dab_detr")(lambda args: None)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'dn_dab_dert'; did you mean 'dn_dab_detr'\?.*dab_detr"):
        models.build_model(SimpleNamespace(modelname="dn_dab_dert"))


def test_every_listed_model_has_a_builder():
    assert {"dab_detr", "dn_dab_detr"} <= set(models.list_models())
    assert all(callable(get_builder(name)) for name in models.list_models())
