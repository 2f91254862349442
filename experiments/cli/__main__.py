from rankwise.experiments.cli import main

main()
