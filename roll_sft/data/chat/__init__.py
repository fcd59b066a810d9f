"""Conversations to token ids and a mask of what is supervised."""
