"""Models in the forms of other programs: each file is read back and checked before it goes anywhere."""
