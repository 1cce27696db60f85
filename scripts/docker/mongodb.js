// Makes the one-node replica set of docker-compose.yml and its users, with the rights that scripts/servers.py gives
// them. Each step may have been done before.

const fs = require("fs");

function password(user) {
  const variable = `MONGODB_${user.toUpperCase()}_PASSWORD`;
  const file = process.env[`${variable}_FILE`];
  return file ? fs.readFileSync(file, "utf8").replace(/\n+$/, "") : process.env[variable];
}

function connected() {
  const login = `admin:${encodeURIComponent(password("admin"))}`;
  for (;;) {
    try {
      // Not returned at once: mongosh would wait for the connection outside of the `try`.
      const admin = connect(`mongodb://${login}@mongodb:27017/admin?directConnection=true&serverSelectionTimeoutMS=2000`);
      return admin;
    } catch (error) {
      if (error.codeName === "AuthenticationFailed") {
        console.error(
          "MongoDB refuses MONGODB_ADMIN_PASSWORD. It is fixed at the first start: give the one of then, " +
            "or remove all data with: docker compose down -v"
        );
        quit(1);
      }
      // It is not there yet.
      sleep(500);
    }
  }
}

const admin = connected();

try {
  admin.adminCommand({ replSetInitiate: { _id: "rs0", members: [{ _id: 0, host: "mongodb:27017" }] } });
} catch (error) {
  if (error.codeName !== "AlreadyInitialized") throw error;
}
while (!admin.hello().isWritablePrimary) sleep(200);

const views = process.env.MONGODB_DATABASE || "watershed";
const roles = {
  operator: ["readWriteAnyDatabase", "dbAdminAnyDatabase", "clusterMonitor"],
  projection: [{ role: "readWrite", db: views }],
  query: [{ role: "read", db: views }],
};
for (const user in roles) {
  const rights = { pwd: password(user), roles: roles[user] };
  if (admin.getUser(user)) admin.updateUser(user, rights);
  else admin.createUser({ user, ...rights });
}
