"""What a recipe changes on one rank beside a plain full fine-tune."""
