"""Tables and figures as pure functions of result files."""
