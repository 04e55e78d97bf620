"""The `loopwise` command: one file per verb, each with the functions that Python code can call as well."""
