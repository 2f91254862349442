"""The loop: K members of one method over one frozen model, from the first step to the last evaluation."""
