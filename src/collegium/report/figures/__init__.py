"""The figures: functions from results to `Figure`, one file for each section of the page."""
