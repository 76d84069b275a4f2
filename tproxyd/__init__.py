"""A Linux TPROXY transparent proxy daemon that keeps the client's source address."""

__version__ = "0.1.0"
