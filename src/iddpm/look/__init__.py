"""What a person looks at: charts, and the words around figures."""
