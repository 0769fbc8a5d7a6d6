"""What is installed, what this machine can run at which precision, what is wrong and the fix."""

from qurl.doctor.checks import Finding, Level, diagnose

__all__ = ["Finding", "Level", "diagnose"]
