"""The scores of the probabilities as text."""

from typing import Any

from hf_denseseg.reports.class_table import percent


def calibration_of(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each score of the probabilities; none if they were not measured."""
    if scores.get("calibration_error") is None:
        return []
    numbers = {"Brier score": "brier_score", "negative log-likelihood": "negative_log_likelihood"}
    fitted = {"fitted temperature": "fitted_temperature"} if "fitted_temperature" in scores else {}
    error = ("calibration error (ECE)", f"{percent(scores['calibration_error'])} %")
    return [error, *((label, f"{scores[key]:.4f}") for label, key in (numbers | fitted).items())]
