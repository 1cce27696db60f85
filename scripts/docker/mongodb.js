// Makes the one-node replica set of docker-compose.yml and its users, with the rights that scripts/servers.py gives them.
// Each step may have been done before.

const password = (user) => process.env[`MONGODB_${user.toUpperCase()}_PASSWORD`];

const admin = connect(`mongodb://admin:${password("admin")}@mongodb:27017/admin?directConnection=true`);

try {
  admin.adminCommand({ replSetInitiate: { _id: "rs0", members: [{ _id: 0, host: "mongodb:27017" }] } });
} catch (error) {
  if (error.codeName !== "AlreadyInitialized") throw error;
}
while (!admin.hello().isWritablePrimary) sleep(200);

const roles = {
  operator: ["readWriteAnyDatabase", "dbAdminAnyDatabase", "clusterMonitor"],
  projection: [{ role: "readWrite", db: "watershed" }],
  query: [{ role: "read", db: "watershed" }],
};
for (const user in roles) {
  const rights = { pwd: password(user), roles: roles[user] };
  if (admin.getUser(user)) admin.updateUser(user, rights);
  else admin.createUser({ user, ...rights });
}
