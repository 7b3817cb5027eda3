-- Runs once, as the superuser, when the cluster is new. The owner makes tables and roles (`lookup migrate`) and is no superuser.
\getenv owner_password POSTGRES_OWNER_PASSWORD
CREATE ROLE lookup_owner LOGIN CREATEROLE PASSWORD :'owner_password';
CREATE DATABASE lookup OWNER lookup_owner;
