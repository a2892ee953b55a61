"""What strangers wrote: rows of any file -> pairs; a pair -> its text in any chat template."""
