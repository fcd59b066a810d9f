"""What answers are worth: their text, metrics of ours and of the user, in a process of its own."""
