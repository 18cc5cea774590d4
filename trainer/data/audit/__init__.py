"""What every record of a data set is: read, measured, compared, and told record by record."""
