"""The commands behind `octavo`: each module configures its parser and runs; heavy imports wait until it runs."""
