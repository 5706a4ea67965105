"""Files of rows beside plain text: tables of Arrow and Parquet, compressed files, and several files as one."""
