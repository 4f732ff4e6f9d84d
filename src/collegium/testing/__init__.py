"""Checks that any router, controller or balance loss must pass, ours or anybody's, as scikit-learn has them for
estimators.

    from collegium.testing import check_router, router_checks

    check_router(lambda d, E, K: MyRouter(d, E, K))        # all of them

    @pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
    def test_my_router(check):                             # one test for each
        check(lambda d, E, K: MyRouter(d, E, K))

    check_controller(lambda: MyController(rate=1e-3))      # what `controller_checks` lists
    check_balance_loss(lambda E: MyLoss())

A check is given what makes the thing (a router of width d for E experts, of which K; a controller whose settings suit
sigmoid scores; a loss for E experts) and raises AssertionError. What a router cannot do it says by its parts
(`Part.causal`, `Part.learns`, ...), and is then not asked for.
"""

from __future__ import annotations

from collegium.testing.controllers import Controller, MakeController, check_controller, controller_checks
from collegium.testing.losses import check_balance_loss
from collegium.testing.routers import MakeRouter, check_router, router_checks

__all__ = [
    "Controller",
    "MakeController",
    "MakeRouter",
    "check_balance_loss",
    "check_controller",
    "check_router",
    "controller_checks",
    "router_checks",
]
