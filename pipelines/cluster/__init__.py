"""Runs on a KFP server: what is sent there, and what it says of them."""
