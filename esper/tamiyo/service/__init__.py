"""Tamiyo as a service for many training runs: protocol, gates, server, client."""
