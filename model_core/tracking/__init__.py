"""What steps tell MLflow: a spool on disk that they write (`spool`), and a process beside them that sends it (`drain`)."""
