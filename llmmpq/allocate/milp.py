"""HiGHS as a solver of problems that are linear in x: feasibility of several limits, and diagonal programs.

One thread and a fixed seed. HiGHS compares with tolerances, so what it returns is checked in whole numbers by the
caller, and only its dual bound is believed, less its own tolerance.
"""

from __future__ import annotations

import highspy
import numpy as np

# HiGHS's tolerances are absolute (1e-7): objectives are scaled so that they are far below what matters.
OBJECTIVE_SCALE = 1e6
HIGHS_TOLERANCE = 1e-6


def solve_linear(
    *,
    objective_N: np.ndarray,
    costs_KN: np.ndarray,
    limits: tuple[int, ...],
    allowed_UW: np.ndarray,
    time_limit_s: float,
) -> tuple[np.ndarray | None, float]:
    """(the option taken by each unit or None where nothing was found, a lower bound; inf when nothing can fit)."""
    num_units, width = allowed_UW.shape
    num_columns, num_limits = num_units * width, len(limits)
    if not allowed_UW.any(axis=1).all():
        return None, float("inf")
    shift_U = np.where(allowed_UW, objective_N.reshape(num_units, width), np.inf).min(axis=1)
    objective = objective_N - np.repeat(shift_U, width)
    largest = float(np.abs(objective[allowed_UW.reshape(-1)]).max())
    scale = OBJECTIVE_SCALE / largest if largest > 0 else 1.0

    rows_per_column = 1 + num_limits
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = num_columns, num_units + num_limits
    model.col_cost_ = np.where(allowed_UW.reshape(-1), objective * scale, 0.0)
    model.col_lower_, model.col_upper_ = np.zeros(num_columns), allowed_UW.reshape(-1).astype(np.float64)
    model.integrality_ = [highspy.HighsVarType.kInteger] * num_columns
    model.row_lower_ = np.append(np.ones(num_units), np.full(num_limits, -highspy.kHighsInf))
    model.row_upper_ = np.append(np.ones(num_units), np.asarray(limits, dtype=np.float64))
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, rows_per_column * num_columns + 1, rows_per_column)
    unit_of = np.repeat(np.arange(num_units), width)
    limit_rows = [np.full(num_columns, num_units + k) for k in range(num_limits)]
    model.a_matrix_.index_ = np.column_stack([unit_of, *limit_rows]).reshape(-1)
    model.a_matrix_.value_ = np.column_stack([np.ones(num_columns), *costs_KN.astype(np.float64)]).reshape(-1)

    solver = highspy.Highs()
    for option, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": 1e-9,
        "time_limit": max(time_limit_s, 0.01),
    }.items():
        solver.setOptionValue(option, value)
    solver.passModel(model)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None, float("inf")
    bound = float(shift_U.sum())  # the least of every unit, which also holds
    if largest > 0:
        bound = max(bound, bound + (solver.getInfo().mip_dual_bound - HIGHS_TOLERANCE) / scale)
    values = np.asarray(solver.getSolution().col_value)
    if len(values) != num_columns:
        return None, bound
    return np.where(allowed_UW, values.reshape(num_units, width), -1.0).argmax(axis=1), bound
