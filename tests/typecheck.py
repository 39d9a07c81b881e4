"""The run-time type checker of the tests (see conftest.py); an int is a float, as in PEP 484."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
