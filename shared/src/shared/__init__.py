"""The contracts: the only code that two services may both import."""
