"""What we say: reads the folders of runs, never trains, never imports torch."""
