"""One verb a file; the file name is the verb."""
