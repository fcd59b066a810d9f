"""The token cache: built once, mapped by every rank."""
